"""The code of a registered version's model, which MLflow runs wherever it loads one."""

from mlflow.models import set_model

from flows.serving import Service

set_model(Service())
