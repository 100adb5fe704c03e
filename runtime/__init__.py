"""Device side: a frame becomes an Inspection. No torch, no network."""
