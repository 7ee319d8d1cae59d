"""The method: rows and their record, the plan that chooses a form, the conditioner, and the operations that apply it."""
