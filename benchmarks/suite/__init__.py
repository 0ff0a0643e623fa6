"""Parts of the benchmarks: cases, their models in each library, timing and results."""
