"""Step tables on the geometries of released models: python -m benchmarks.step_tables"""
