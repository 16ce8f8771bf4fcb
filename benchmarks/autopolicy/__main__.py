from benchmarks.autopolicy.run import main

main()
