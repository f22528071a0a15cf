"""Pure functions of tensors, shared by every family. No modules, no state."""
