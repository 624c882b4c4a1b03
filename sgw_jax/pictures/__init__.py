"""Drawing: panels of predictions, galleries, charts, and pictures inside a page."""
