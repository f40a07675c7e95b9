"""Trainings on rented machines."""
