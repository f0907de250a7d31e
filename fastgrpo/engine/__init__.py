"""How the UNet is run fast: `workers` for CPU cores."""
