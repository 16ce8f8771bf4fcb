"""``python -m dit_rewrite`` runs the command ``dit-rewrite``."""

from dit_rewrite.cli.main import main

raise SystemExit(main())
