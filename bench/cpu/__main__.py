from bench.cpu.main import main

main()
