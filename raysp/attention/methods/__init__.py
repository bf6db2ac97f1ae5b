"""The methods of parallel attention; each is an executor over the same schedule and kernels."""
