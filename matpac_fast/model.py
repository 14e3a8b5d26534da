"""Matpac: the student-teacher model being pre-trained."""
