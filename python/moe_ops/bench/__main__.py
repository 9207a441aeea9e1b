from moe_ops.bench.main import main

main()
