"""The only place that sees an ``nn.Module``: chat layout, hooks, loading, capture."""
