"""Predictions of a trained network: on arrays (`predictor`) and on image files (`predict_files`)."""
