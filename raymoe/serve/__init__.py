"""The HTTP side: OpenAI's API before an engine, as two Ray Serve deployments. The only room that knows ray.serve."""
