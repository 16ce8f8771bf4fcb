from benchmarks.step_tables.run import main

main()
