"""Run trainings on rented machines in clouds."""
