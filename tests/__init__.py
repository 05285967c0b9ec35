# With these flags XLA compiles a tiny model for CPUs in a sixth of the time. The program itself is slower.
QUICK_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
