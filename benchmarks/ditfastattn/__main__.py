from benchmarks.ditfastattn.run import main

main()
