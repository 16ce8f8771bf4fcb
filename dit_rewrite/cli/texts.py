"""Texts of the help of each command: a description, and command lines without the name of the program."""

DESCRIPTIONS = {
    "analyze": """
        Measure how much the keys, values, attention, MLPs, blocks and output of a model change between the steps of its
        sampler, over several prompts. Writes analysis.safetensors and plots. An interrupted analysis is continued.
    """,
    "autopolicy": """
        Find the policy with the least error under one bound. The search measures the model, runs the policies that it
        considers, and compares the best one with fewer steps of a solver, which is returned where it is better. Writes
        the policy with its certificate, for generate --policy.
    """,
    "demo": """
        Sample the same images with the bundled denoiser without caching, with two policies, and with fewer steps at the
        same time. Prints a table, and writes images, graphs and results.
    """,
    "explain": """
        Run one trajectory of a model under a policy. Prints the places where values may be reused, with the condition
        of each, and the predicted and measured savings.
    """,
    "generate": "Sample images or videos with a diffusers pipeline whose denoiser is rewritten with a policy.",
    "latency": """
        Measure how long self-attention, cross-attention and MLP of a PixArt block take, by the number of text tokens
        (CachedAttention, figure 2). Writes the times and a plot.
    """,
    "report": """
        Run a model under a policy, and write one self-contained HTML page: sites, graph diff, decisions over time,
        predicted beside measured costs, and on request an analysis, a plan, a front and samples.
    """,
    "search": """
        Search the strategy of each attention at each step: compute, reuse its output, share it across guidance, or
        attend in a window (DiTFastAttn). Writes a plan, for the policy ditfastattn:plan=FILE. An interrupted search is
        continued.
    """,
    "tune": """
        Try parameters of a policy, and keep those that no other beats in all objectives. Writes a table of this front,
        and each of its policies for generate --policy.
    """,
    "verify": """
        Compare a rewritten model with the original: bit for bit where nothing is reused, and its reuse with a replay of
        the recorded decisions. The exit code is 1 if they differ by more than rounding.
    """,
}

EXAMPLES = {
    "analyze": ("analyze --prompts 8 --out analysis", "analyze --model ./dit --prompts prompts.txt --steps 28 --heads"),
    "autopolicy": (
        "autopolicy --speedup 3 --out policy.json",
        "autopolicy --model my_package.my_module:factory --max-error 0.02",
    ),
    "demo": ("demo", "demo --images 4 --intervals 2 3 --out demo"),
    "explain": (
        "explain --policy taylorseer:interval=3 --steps 50",
        "explain --model my_package.models:build --policy fora:interval=2 --json",
    ),
    "generate": (
        "generate --model facebook/DiT-XL-2-256 --label 207 --policy fora:interval=3",
        "generate --model ./wan --prompt 'a cat on a sofa' 'a dog' --negative-prompt blurry --frames 17 --seed 7",
    ),
    "latency": ("latency --conditions 16,64,256 --width 288",),
    "report": (
        "report --policy fora:interval=3 --steps 50 --out report.html",
        "report --model ./dit --analysis analysis/analysis.safetensors --images reference.png fora.png",
    ),
    "search": (
        "search --delta D4 --conditional first --out plan.json",
        "search --model ./pixart --prompt 'a cat' --negative-prompt blurry --conditional second --grid latent",
    ),
    "tune": (
        "tune --policy fora --space 'interval=2|3|4' 'anchor=start|paper' --sampler grid",
        "tune --policy dqar --space 'warmup=0.0..0.4' --trials 30 --storage dqar.journal",
    ),
    "verify": ("verify", "verify --model my_package.models:build --policy fora:interval=3 --dump graphs"),
}
