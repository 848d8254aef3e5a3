"""Running a model on this machine: model code over a small op set, two back ends, sampling and generation.

    from everybit.engine.generate import generate
    from everybit.engine.runtime import Runtime
    from everybit.engine.sampling import Sampling

numpy and C++; importing it needs neither torch nor transformers, and this file imports nothing.
"""
