"""What `app` puts together, beside the layers."""
