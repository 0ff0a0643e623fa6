"""The parts of the benchmarks: cases, what each library makes of them, and how runs become rows."""
