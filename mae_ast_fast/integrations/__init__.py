"""The encoder inside other libraries: Hugging Face transformers and s3prl."""
