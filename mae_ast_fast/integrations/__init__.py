"""The encoder in other libraries."""
