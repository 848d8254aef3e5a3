"""Export to GGUF, the file format of llama.cpp (numpy and the gguf package)."""

from everybit.integrations.gguf.file import TYPES, Report, export_gguf

__all__ = ["TYPES", "Report", "export_gguf"]
