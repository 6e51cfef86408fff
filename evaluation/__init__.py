"""Images out of models and numbers out of images: prompt sets, generation, the metric plug-ins."""
