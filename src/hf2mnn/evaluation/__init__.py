"""How far a conversion's answers are from PyTorch's, in the runtime that will give them."""
