"""What a run will take before it starts: its step is traced on tensors without memory, and put beside the plan."""
