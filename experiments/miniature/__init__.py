"""The miniature: a small Stable-Diffusion-shaped model that this project trains and ships."""
