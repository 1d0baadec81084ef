"""The real engines behind the roles: vLLM, DeepSpeed and transformers. Nothing here knows Ray."""
