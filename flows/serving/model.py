"""What MLflow runs wherever it loads a registered version: the code of that version's model."""

from mlflow.models import set_model

from flows.serving import Service

set_model(Service())
