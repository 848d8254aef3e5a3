"""Which hardware, which precision, how many, split how, at what price, and how sure."""
