"""One module a family; each has PROVIDERS, `inputs`, `flops` and `exact`."""
