"""What turns gradients into updates: so far the learning rate's schedule."""
