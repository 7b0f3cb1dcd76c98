"""One module a family; each has `inputs`, `verify` (errors against float64 by provider), `providers` and `flops`."""
