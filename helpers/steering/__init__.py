"""Making a model more truthful without training it: inference-time intervention, and the sweep that shows its price."""
