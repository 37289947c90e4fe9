"""The synthetic world: two aerial domains, urban and rural, drawn on the fly."""
