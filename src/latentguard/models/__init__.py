"""What touches the network (an ``nn.Module``): chat layout, hooks, loading, capture."""
