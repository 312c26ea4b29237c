"""The roofline model: what a machine could do at most, from its data sheet. No torch."""
