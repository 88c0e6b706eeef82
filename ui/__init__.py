"""The page and the endpoints, over `backend.Studio`. Nothing here imports torch."""
