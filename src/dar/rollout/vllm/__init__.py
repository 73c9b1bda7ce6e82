"""The engine that has a vLLM server sample, and what that server loads of this library."""
