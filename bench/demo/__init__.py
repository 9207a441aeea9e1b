"""What `make demo` runs: `moe_ops.demo`, what its experts know, and models beside eager."""
