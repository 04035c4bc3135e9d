"""Put a model's step under a budget and keep it there: `fit.fit` for a batch and a budget, `switches` to enable and disable."""
