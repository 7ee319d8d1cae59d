"""The method: what a kernel meets (`record`, `rows`), the form that is chosen (`plan`), and how it conditions the gradient."""
