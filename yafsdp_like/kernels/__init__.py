"""Triton kernels that touch many parameters in one launch, each beside its plain torch reference.

They know addresses, sizes and dtypes, nothing of units, ranks' groups or optimizers.
"""
