from benchmarks.dqar_fidelity.run import main

main()
