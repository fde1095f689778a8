"""What is the loss? The public functions, their arguments, and the schedules of the KL weight."""
