"""Everything together: real MLflow servers, real QitOS agents, real processes, real faults."""
