"""What is the loss: the public functions, their arguments, and the schedules of the KL weight."""
