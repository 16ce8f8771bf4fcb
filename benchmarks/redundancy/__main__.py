from benchmarks.redundancy.run import main

main()
