"""What runs at a hospital: app (Flower's ClientApp, glue) and site (which site this is and what it allows)."""
