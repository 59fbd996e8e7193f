"""The look-up of prices, against answers of the shape that the Pricing API gives."""

import json
import shutil
import tomllib

import boto3
import pytest
from botocore.stub import Stubber

from infra.errors import ConfigError
from infra.prices import PATH, refresh
from sizing.instances import INSTANCES, PRICES


def product(*hourly: float, unit: str = "Hrs") -> str:
    """One entry of PriceList: JSON in a text, with a term for each price."""
    terms = {
        f"SKU.{index}": {"priceDimensions": {f"SKU.{index}.R": {"unit": unit, "pricePerUnit": {"USD": f"{usd:.10f}"}}}}
        for index, usd in enumerate(hourly)
    }
    return json.dumps({"product": {"sku": "SKU"}, "terms": {"OnDemand": terms}})


@pytest.fixture
def api():
    client = boto3.client("pricing", region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b")
    with Stubber(client) as stub:
        yield client, stub


@pytest.fixture
def path(tmp_path):
    return shutil.copy(PATH, tmp_path / "prices.toml")


def asked(name, region):
    fields = {"instanceType": name, "regionCode": region, "operatingSystem": "Linux", "tenancy": "Shared"}
    fields |= {"preInstalledSw": "NA", "capacitystatus": "Used"}
    filters = [{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in fields.items()]
    return {"ServiceCode": "AmazonEC2", "FormatVersion": "aws_v1", "Filters": filters}


def answer(stub, answers, region="us-east-1"):
    for name in INSTANCES:
        stub.add_response("get_products", {"FormatVersion": "aws_v1", "PriceList": answers(name)}, asked(name, region))


def test_prices_are_looked_up_and_written(api, path):
    client, stub = api
    answer(stub, lambda name: [product(0.0, 2 * INSTANCES[name].usd_per_hour), product(3.0, unit="Quantity")], "eu-north-1")
    said = refresh("eu-north-1", path=path, client=client)
    stub.assert_no_pending_responses()
    fresh = tomllib.loads(path.read_text())
    assert fresh["instances"]["region"] == "eu-north-1" and fresh["instances"]["unconfirmed"] == []
    assert fresh["instances"]["usd_per_hour"] == {name: pytest.approx(2 * old) for name, old in PRICES["instances"]["usd_per_hour"].items()}
    assert (fresh["standing"], fresh["monthly"]) == (PRICES["standing"], PRICES["monthly"])
    assert path.read_text().startswith(PATH.read_text().partition("\n[instances]\n")[0])
    assert said[0] == "g6.xlarge: 0.8048 -> 1.6096" and said[-1] == f"wrote prices.toml: {len(INSTANCES)} prices of eu-north-1"


def test_a_type_that_is_not_sold_has_no_price(api, path):
    client, stub = api
    answer(stub, lambda name: [] if name.startswith("gr6") else [product(INSTANCES[name].usd_per_hour)])
    assert refresh(path=path, client=client) == [
        "gr6.4xlarge: 1.5392 -> no price",
        "gr6.8xlarge: 2.4464 -> no price",
        f"wrote prices.toml: {len(INSTANCES) - 2} prices of us-east-1",
    ]
    assert "gr6.4xlarge" not in tomllib.loads(path.read_text())["instances"]["usd_per_hour"]


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (lambda name: [product(0.8), product(0.9)], "the Pricing API has 2 prices of g6.xlarge in us-east-1; nothing was written"),
        (lambda name: [], "the Pricing API has no price of any G6, Gr6 or G6e instance in us-east-1; nothing was written"),
    ],
)
def test_an_answer_that_cannot_be_read_changes_nothing(api, path, answers, said):
    client, stub = api
    answer(stub, answers)
    with pytest.raises(ConfigError, match=said):
        refresh(path=path, client=client)
    assert path.read_bytes() == PATH.read_bytes()


def test_an_api_that_refuses_changes_nothing(api, path):
    client, stub = api
    stub.add_client_error("get_products", "AccessDeniedException", "not you")
    with pytest.raises(ConfigError, match="could not be asked, which needs pricing:GetProducts: .*not you"):
        refresh(path=path, client=client)
    assert path.read_bytes() == PATH.read_bytes()


def test_a_region_that_there_is_not_is_refused_before_anybody_is_asked(path):
    with pytest.raises(ConfigError, match="--region eu-nowhere-1: there is no such region"):
        refresh("eu-nowhere-1", path=path)
